"""mmtok inside other programs: evaluators and serving engines. Nothing else of this package imports what is here."""
