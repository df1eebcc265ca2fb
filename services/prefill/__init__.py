"""The prefill process: runs prompts, offers their KV."""
