#include "textflag.h"

// func sumBlocks(b []byte) uint64
//
// Each 64-bit lane is split into its halves, which are added up in lanes of
// 64 bits: no carry is lost in less than 2^32 blocks.
TEXT ·sumBlocks(SB), NOSPLIT, $0-32
	MOVQ b_base+0(FP), SI
	MOVQ b_len+8(FP), CX
	SHRQ $7, CX
	VPXOR    Y0, Y0, Y0 // sums of low halves
	VPXOR    Y1, Y1, Y1
	VPXOR    Y2, Y2, Y2 // sums of high halves
	VPXOR    Y3, Y3, Y3
	VPCMPEQD Y15, Y15, Y15
	VPSRLQ   $32, Y15, Y15 // a low half
	TESTQ    CX, CX
	JZ       done

block: // of 128 bytes
	VMOVDQU (SI), Y4
	VMOVDQU 32(SI), Y5
	VMOVDQU 64(SI), Y6
	VMOVDQU 96(SI), Y7
	VPAND   Y15, Y4, Y8
	VPAND   Y15, Y5, Y9
	VPAND   Y15, Y6, Y10
	VPAND   Y15, Y7, Y11
	VPSRLQ  $32, Y4, Y4
	VPSRLQ  $32, Y5, Y5
	VPSRLQ  $32, Y6, Y6
	VPSRLQ  $32, Y7, Y7
	VPADDQ  Y8, Y0, Y0
	VPADDQ  Y9, Y1, Y1
	VPADDQ  Y4, Y2, Y2
	VPADDQ  Y5, Y3, Y3
	VPADDQ  Y10, Y0, Y0
	VPADDQ  Y11, Y1, Y1
	VPADDQ  Y6, Y2, Y2
	VPADDQ  Y7, Y3, Y3
	ADDQ    $128, SI
	DECQ    CX
	JNZ     block

done:
	VPADDQ       Y1, Y0, Y0
	VPADDQ       Y3, Y2, Y2
	VPADDQ       Y2, Y0, Y0
	VEXTRACTI128 $1, Y0, X1
	VPADDQ       X1, X0, X0
	VPSRLDQ      $8, X0, X1
	VPADDQ       X1, X0, X0
	VMOVQ        X0, AX
	VZEROUPPER
	MOVQ         AX, ret+24(FP)
	RET
