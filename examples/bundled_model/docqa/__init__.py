"""The generator of documents, questions and answers that the bundled model is trained on; start at generate.py."""
