"""Shared parts of tests of several folders: small federations, example methods, clocks, trusts, reference formulas."""
