"""What the tests are made of, each thing once: models, engines, waiting, leaks, and both protocols.

No test and no fixture lies here: tests are in files named after the promises, fixtures in the
conftest.py files.
"""
