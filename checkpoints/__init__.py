"""Models and tensors as files: safetensors, Hugging Face's names, Google's TensorFlow checkpoints, provenance."""
