"""`fedpriv flower`: running an unmodified Flower app in simulation."""
