"""What the sweeps of the tests are of, and what two ways to run them must agree in."""

from brise.quant.config import QuantConfig, QuantSpec, Rule


def rules(**spec) -> QuantConfig:
    return QuantConfig((Rule(("*layers.*",), QuantSpec(**spec)),))


CONFIGS = {"int8": rules(format="int8"), "nf4": rules(format="nf4", group_size=32)}


def figures(rows):
    return {
        row.name: (row.key, row.perplexity, row.divergence, row.memory.bytes, row.protocol) for row in rows
    }
