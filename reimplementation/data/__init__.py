"""What the others look at: cameras, a street, and documents that nobody vouches for."""
