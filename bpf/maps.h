/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * All maps. PIN(name) marks those that are pinned on bpffs, under a hash of this ABI; they outlive the daemon there.
 * PIN_OF_PROGRAM(name) is a pin for each loaded program: stages that two programs share would be those of the later one.
 * Everything that is not per CPU, no hash and no map of devices is BPF_F_MMAPABLE: the control plane writes it as memory.
 */
#ifndef XDPLB_MAPS_H
#define XDPLB_MAPS_H

#include "abi.h"

/* xdplb/dataplane/loader.py makes the maps and pins them: bcc's own would be pinned without a look at what is there. */
#undef BPF_TABLE_PINNED
#define BPF_TABLE_PINNED(type, key, leaf, name, entries, pin, flags) BPF_F_TABLE(type, key, leaf, name, entries, flags)

#define LINKS_MISSED 64 /* a power of two */
#define ANSWER_BUDGETS 4096
#define ANSWER_TOTALS 3 /* of resets, errors, "too big" */

/* Slots by the cache line: an array's elements are padded to 8 bytes, so single words would take twice the memory. */
struct slot_block {
	__u32 slot[16];
};

struct directory {
	__u32 half;
	__u32 alive_until;                   /* in ticks: after that, nobody takes care of all this any more (watchdog.h) */
	__u64 listening[2][LISTENING_WORDS]; /* by half: bits of the addresses that services listen on (lookup.h) */
	__u64 own_macs[1 << OWN_MAC_BITS]; /* words of links.h that stand for this host's MAC addresses: one a place, so nearly
					      all */
};

/* How many reports have come, and for the latest of them to which address their tunnels lead. */
struct tunnel_news {
	__u32 count;
	__u32 pad;
	struct address latest[TUNNEL_NEWS];
};

BPF_TABLE_PINNED("array", __u32, struct directory, directory, 1, PIN("directory"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct address_bucket, addresses, 2 * ADDRESS_BUCKETS, PIN("addresses"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct interval, intervals, 2 * INTERVALS, PIN("intervals"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct service, services, SERVICES + 1, PIN("services"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct backend, backends, BACKENDS + 1, PIN("backends"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct slot_block, slots, SLOTS / 16, PIN("slots"), BPF_F_MMAPABLE);

BPF_TABLE_PINNED("array", __u32, struct transition, transitions, SLOTS, PIN("transitions"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct flow_set, flow_sets, FLOW_SETS, PIN("flow_sets"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct syn_record, syn_records, SYN_RECORDS, PIN("syn_records"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct flow_set, snat_sets, SNAT_SETS, PIN("snat_sets"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct snat_tuple, snat_tuples, 8 * SNAT_SETS, PIN("snat_tuples"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct address, sources, MAX_SOURCES, PIN("sources"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("percpu_array", __u32, struct flow_budget, flow_budgets, 1, PIN("flow_budgets"), 0);
BPF_TABLE_PINNED("percpu_array", __u32, struct flow_counters, flow_counters, 1, PIN("flow_counters"), 0);
BPF_TABLE_PINNED("array", __u32, __u32, sweep_position, 1, PIN("sweep_position"), BPF_F_MMAPABLE);

BPF_TABLE_PINNED("array", __u32, struct load, loads, MAX_BACKEND_IDS, PIN("loads"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("percpu_array", __u32, __u32, wrr_positions, SERVICES + 1, PIN("wrr_positions"), 0);
BPF_TABLE_PINNED("percpu_array", __u32, struct choice, choices, 1, PIN("choices"), 0);

BPF_TABLE_PINNED("percpu_array", __u32, struct backend_counters, backend_counters, BACKENDS + 1, PIN("backend_counters"), 0);
BPF_TABLE_PINNED("percpu_array", __u32, struct drop_counters, drop_counters, SERVICES + 1, PIN("drop_counters"), 0);
BPF_TABLE_PINNED("percpu_array", __u32, struct verdict_counters, verdict_counters, 1, PIN("verdict_counters"), 0);

BPF_TABLE_PINNED("lru_hash", struct fragment_key, struct fragment, fragments, FRAGMENTS, PIN("fragments"), 0);

BPF_TABLE_PINNED("hash", struct address, struct tunnel_way, tunnels, BACKENDS, PIN("tunnels"), BPF_F_NO_PREALLOC);
BPF_TABLE_PINNED("array", __u32, struct tunnel_news, tunnel_news, 1, PIN("tunnel_news"), BPF_F_MMAPABLE);

BPF_TABLE_PINNED("array", __u32, struct probe_way, probe_ways, MAX_PROBES, PIN("probe_ways"), BPF_F_MMAPABLE);

BPF_TABLE_PINNED("array", __u32, struct flow_set, nat_sets, NAT_SETS, PIN("nat_sets"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, struct nat_hint, nat_hints, BACKENDS + 1, PIN("nat_hints"), BPF_F_MMAPABLE);

BPF_TABLE_PINNED("array", __u32, struct answer_budget, answer_budgets, ANSWER_BUDGETS, PIN("answer_budgets"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, __u64, answer_totals, ANSWER_TOTALS, PIN("answer_totals"), BPF_F_MMAPABLE);

BPF_TABLE_PINNED("array", __u32, struct link_facts, link_facts, 1 << LINK_SET_BITS, PIN("link_facts"), BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", __u32, __u32, links_missed, LINKS_MISSED, PIN("links_missed"), BPF_F_MMAPABLE);

/* How many copies of a packet that is cut have arrived (cut.h), by the number that they carry. */
struct copy_count {
	__u32 number;
	__u32 seen;
};

/* The devices that get copies of what is to be cut, PIN("copies"); all entries are the same one. bcc's macro has no look-up. */
struct copies_table_t {
	int key;
	int leaf;
	int *(*lookup)(int *);
	u64 (*redirect_map)(int, u64);
	u32 max_entries;
};
__attribute__((section("maps/devmap"))) struct copies_table_t copies = { .max_entries = COPIES };
BPF_TABLE_PINNED("array", __u32, struct copy_count, copy_counts, COPY_COUNTS, PIN("copy_counts"), BPF_F_MMAPABLE);

BPF_TABLE_PINNED("percpu_array", __u32, struct tail_call, tail_calls, 1, PIN("tail_calls"), 0);
BPF_TABLE_PINNED("percpu_array", __u32, struct found, founds, 1, PIN("founds"), 0);
BPF_TABLE_PINNED("prog", __u32, __u32, stages, STAGE_COUNT, PIN_OF_PROGRAM("stages"), 0);

#endif
