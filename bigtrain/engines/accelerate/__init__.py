"""Hugging Face models under Accelerate."""
