"""DeepSpeed's ZeRO as the strategy uses it: its settings, and its state in canonical form."""
