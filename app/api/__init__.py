"""HTTP in and out: who is admitted, what is decoded, what is answered."""
