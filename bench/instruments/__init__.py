"""What every benchmark measures with: clocks, driver, bandwidth, timing, results files, code digest, words, drawing."""
