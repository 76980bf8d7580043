"""What is handed to production: a Triton model repository, a C++ program."""
