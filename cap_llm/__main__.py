"""`python -m cap_llm`: the same as `cap-llm`."""

from cap_llm.train import script

if __name__ == "__main__":
    script()
