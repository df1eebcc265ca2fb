"""Model folders: fetching, converting, tokenizers, chat templates."""
