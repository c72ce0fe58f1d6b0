"""Reading images and records, and making batches of them."""
