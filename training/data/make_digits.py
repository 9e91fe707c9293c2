"""Writes the digits that training and tests use; see `diffusers_ext.data.make_digits`."""

from diffusers_ext.data.make_digits import main

if __name__ == "__main__":
    main()
