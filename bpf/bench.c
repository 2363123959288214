/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Measuring by test runs. The kernel gives a program its own output back from the second round on, so a wrapper makes each
 * round's packet afresh: it takes off what the last round put in front, writes the headers of the case, draws the flow from a
 * pseudo-random sequence (a constant flow would hide every cache miss), and calls the program under test. Its own cost is
 * measured with the empty program and subtracted.
 */
#include "wire.h"
#include "frame.h"

#define HEADERS 80
#define TARGETS 16

struct bench_case {
	__u64 header[HEADERS / 8];
	__u32 flow_mask;
	__u32 target;
	__u32 length; /* of the frame */
	__u32 ipv6;
};

struct sequence {
	__u64 state;
};

BPF_TABLE("array", __u32, struct bench_case, bench_case, 1);
BPF_TABLE("percpu_array", __u32, struct sequence, sequence, 1);
BPF_TABLE("prog", __u32, __u32, targets, TARGETS);

/* Numerical Recipes' 64-bit LCG; its high bits are good. */
static __always_inline __u32 draw(struct sequence *sequence)
{
	sequence->state = sequence->state * 6364136223846793005ULL + 1442695040888963407ULL;
	return sequence->state >> 33;
}

/* The flow's number goes into the client's address and port: 16 ports for each address. */
static __always_inline void set_flow(void *frame, __u32 flow, __u32 ipv6)
{
	__be32 host = be32(0x0a400000 | flow >> 4);
	__be16 port = be16(0x8000 | (flow & 15));

	if (ipv6) {
		*(__be32 *)(frame + 34) = host;
		*(__be16 *)(frame + 54) = port;
	} else {
		*(__be32 *)(frame + 26) = host;
		*(__be16 *)(frame + 34) = port;
	}
}

int bench_wrap(struct xdp_md *ctx)
{
	__u32 zero = 0;
	struct bench_case *wanted = bench_case.lookup(&zero);
	struct sequence *numbers = sequence.lookup(&zero);
	long surplus = frame_end(ctx) - frame_start(ctx);
	__u64 *word;

	if (!wanted || !numbers)
		return XDP_ABORTED;
	surplus -= wanted->length;
	if (bpf_xdp_adjust_head(ctx, surplus)) /* called in every case, so that all cases pay for it */
		return XDP_ABORTED;
	word = frame_start(ctx);
	if ((void *)word + HEADERS > frame_end(ctx))
		return XDP_ABORTED;
#pragma unroll
	for (int i = 0; i < HEADERS / 8; i++)
		word[i] = wanted->header[i];
	set_flow(word, draw(numbers) & wanted->flow_mask, wanted->ipv6);
	targets.call(ctx, wanted->target);
	return XDP_ABORTED;
}

int bench_empty(struct xdp_md *ctx)
{
	return XDP_TX;
}

int bench_mac_swap(struct xdp_md *ctx)
{
	struct ethhdr *eth = frame_start(ctx);
	__u16 *word = (__u16 *)eth;

	if ((void *)(eth + 1) > frame_end(ctx))
		return XDP_ABORTED;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u16 destination = word[i];

		word[i] = word[i + 3];
		word[i + 3] = destination;
	}
	return XDP_TX;
}

/* The least that an encapsulating balancer can do: a constant outer header, no look-up, no counter. */
int bench_fixed_encapsulation(struct xdp_md *ctx)
{
	struct ethhdr *eth;
	struct ipv4hdr *ip;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(*ip)))
		return XDP_ABORTED;
	eth = frame_start(ctx);
	ip = (void *)(eth + 1);
	if ((void *)(ip + 1) > frame_end(ctx))
		return XDP_ABORTED;
	*(__u64 *)eth = 0x0200020000000002ULL;
	*(__u32 *)(eth->macs + 8) = 0x01000000;
	eth->type = be16(ETH_P_IP);
	ip->version_ihl = 0x45;
	ip->tos = 0;
	ip->length = be16(80);
	ip->id = 0;
	ip->fragment = be16(IP_DF);
	ip->ttl = 64;
	ip->protocol = IPPROTO_IPIP;
	ip->check = 0x1234;
	ip->source = be32(0x0a000001);
	ip->destination = be32(0x0a000002);
	return XDP_TX;
}
