"""Honest evaluation: one protocol, every baseline and control, a report.

Groups of documents are read, embedded and put in order; variants say under which update each
document is scored; scores are kept by what they depend on, so that nothing is computed twice;
figures, report and plots are made of them.
"""
