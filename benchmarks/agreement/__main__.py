"""Make AGREEMENT.md from what the scripts have saved: python benchmarks/agreement"""

from table import make

if __name__ == "__main__":
    make()
