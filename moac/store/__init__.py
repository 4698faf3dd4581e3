"""What is kept between runs, under keys made of all that it follows from."""
