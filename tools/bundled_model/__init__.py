"""What made the bundled model ``tljax-tiny``: its text, its tokenizer, its training, its evaluation."""
