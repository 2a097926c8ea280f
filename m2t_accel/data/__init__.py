"""From the name of a data set to two views on the device."""
