"""Text: made, read, spread over devices, batched."""
