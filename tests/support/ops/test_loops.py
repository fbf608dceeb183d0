"""Loops are found wherever their blocks stand, and inner loops inside outer ones."""

from tests.support.ops.loops import instructions, loops

PTX = """
	.loc	1 5 0                          // kernel.py:5
	mov.u32 	%r1, %tid.x;
	@%p1 bra 	$L__BB0_4;
	bra.uni 	$L__BB0_1;
$L__BB0_1:                              // =>This Loop Header: Depth=1
	ld.global.v4.b32 	{ %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
$L__BB0_2:
	cp.async.cg.shared.global [ %r214 + 0 ], [ %rd208 + 0 ], 0x10, %r216;
	cp.async.ca.shared.global [ %r214 + 0 ], [ %rd208 + 0 ], 0x4, %r216;
	waitLoop:
	@!complete bra.uni waitLoop;
	@%p2 bra 	$L__BB0_5;
	bra.uni 	$L__BB0_3;
$L__BB0_3:
	@%p3 bra 	$L__BB0_2;
	st.global.b32 	[ %rd1 + 0 ], { %r1 };
	@%p4 bra 	$L__BB0_1;
$L__BB0_4:
	st.global.b64 	[ %rd1 + 0 ], { %r1 };
	ret;
$L__BB0_5:
	@%p9 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	bra.uni 	$L__BB0_3;
"""

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0fe0*/                   STL [R1], R8 ;
        /*0e30*/                   BRA.U UP0, `(.L_x_0) ;
.L_x_1:
        /*1220*/                   LDL R0, [R1] ;
        /*1230*/              @!P0 EXIT ;
        /*26f0*/                   BRA.U !UP0, `(.L_x_1) ;
.L_x_0:
        /*3240*/                   EXIT ;
.L_x_2:
        /*32d0*/                   BRA `(.L_x_2);
"""


def test_blocks_of_a_loop_may_stand_behind_it():
    outer, inner = sorted(loops(PTX), key=lambda each: -each.total())
    assert loops(PTX, innermost=True) == [inner]
    assert inner["cp.async.cg.shared.global 16"] == inner["cp.async.ca.shared.global 4"] == 1
    assert inner["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] == 1
    assert inner["ld.global.v4.b32"] == inner["st.global.b32"] == 0
    assert outer["ld.global.v4.b32"] == outer["st.global.b32"] == 1
    assert inner < outer
    assert outer["st.global.b64"] == 0 and instructions(PTX)["st.global.b64"] == 1


def test_what_stands_before_a_loop_of_the_machine_is_not_in_it():
    (loop,) = loops(SASS)
    assert loop == {"LDL": 1, "EXIT": 1, "BRA.U": 1}


def test_no_loops():
    assert loops("") == loops("	ret;") == []
