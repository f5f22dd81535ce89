"""The paper's tables on a small world: every row trained with several seeds, evaluated, scored, with what it cost."""
