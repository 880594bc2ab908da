"""quantkit: plan, stream, verify and publish quantized language models."""
