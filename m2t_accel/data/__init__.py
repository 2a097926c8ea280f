"""From the name of a dataset to two views on the device."""
