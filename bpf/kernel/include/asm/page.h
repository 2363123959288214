/* Wanted by bcc's helpers; nothing of it is used. */
