"""What is private in torch and transformers, and the one use of wrapt: each with the versions it was checked on."""
