"""A Flower app that two lines of fedpriv make private."""
