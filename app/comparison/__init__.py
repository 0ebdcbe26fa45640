"""What two versions said about the same rows: pairs, what is counted of them, and what it says."""
