"""Encodes text, conversations and prompts as tokens with weights, and trains tokenizers on text."""
