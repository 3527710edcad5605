"""What the findings say, from committed results, from the code, and from what others published."""
