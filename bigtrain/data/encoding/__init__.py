"""From text, conversations and prompts to tokens and their weights; tokenizers learned from text."""
