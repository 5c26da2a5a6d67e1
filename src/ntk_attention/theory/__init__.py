"""The theory of training a prefix (section 3 of the paper), as code that runs; derivations in docs/theory.md."""
