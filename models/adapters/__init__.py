"""What is grafted on a trunk, and what makes maps of several strides from it."""
