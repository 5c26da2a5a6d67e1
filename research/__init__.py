"""What is measured: quality (`experiments`) and speed (`benchmarks`). It imports the library, never the other way."""
