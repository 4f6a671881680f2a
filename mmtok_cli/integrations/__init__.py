"""mmtok inside other programs: evaluators and serving engines. Of this package, only `serving` imports what is here."""
