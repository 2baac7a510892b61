"""What the commands `bench` and `sweep` measure: inputs, cases, times, floors, and the tables and pictures of them."""
