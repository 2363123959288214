/* Empty on purpose: bcc injects its own. */
