"""A DeepSeek V3 of a few million parameters: corpus, tokenizer, training, export, model card."""
