"""Package data: the embedded model, a tiny DeepSeek-V3 quantised by llama.cpp."""
