"""One file per data set, in the layout in which its authors distribute it; coop.py for CoOp's splits of any of them."""
