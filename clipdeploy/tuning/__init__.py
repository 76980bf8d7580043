"""Which Linear costs the accuracy, and which precision each should have."""
