"""Ray clusters: submitting to them, seeing what runs there, raising one to try things on."""
