"""Archives: what they hold, and how models are written to them and made from them."""
