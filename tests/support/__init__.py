"""What tests of several rooms share: small federations, example methods, clocks, trusts, reference formulas."""
