"""Row reads charged by the tier they come from, in energies that others published; nothing here is a measurement."""
