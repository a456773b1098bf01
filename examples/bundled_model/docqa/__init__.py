"""Generator of document question answering for the training of small models; start at generate.py."""
