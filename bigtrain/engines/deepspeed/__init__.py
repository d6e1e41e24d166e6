"""The engine deepspeed: native models under DeepSpeed's ZeRO."""
