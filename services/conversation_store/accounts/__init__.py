"""What tenants and their keys may do, and whether one more turn is within that."""
